"""Models of ours in the layout of Hugging Face, and models of that layout as ours."""
