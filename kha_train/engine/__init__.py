"""The engine: DeepSpeed ZeRO around the decoder. The only room that knows DeepSpeed."""
