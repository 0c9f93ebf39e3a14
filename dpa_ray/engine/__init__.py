"""How a stage is run: engines, the training loop, and its launch on Ray Train."""
