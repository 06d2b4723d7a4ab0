"""The one training loop, its state, optimizer, checkpoints, sharding and logs."""
