"""What `launch.evaluate` does: sets of pictures, feature networks, figures, pages."""
