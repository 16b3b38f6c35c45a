"""The engine: DeepSpeed ZeRO around the decoder. Only this room knows DeepSpeed."""
