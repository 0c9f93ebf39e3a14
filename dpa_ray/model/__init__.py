"""The models and their mathematics: pure torch, transformers and peft; no Ray, no DeepSpeed."""
