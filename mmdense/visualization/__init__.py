"""Images of predictions, and plots of training logs."""
