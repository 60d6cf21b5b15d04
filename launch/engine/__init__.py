"""What the commands share: loop, mesh, checkpoints, writers, console. Nothing about models."""
