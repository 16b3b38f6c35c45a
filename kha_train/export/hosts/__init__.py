"""One file for each model class of transformers that computes what a decoder of ours computes."""
