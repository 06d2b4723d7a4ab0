"""What a network is worth: held-out likelihood, and plots."""
