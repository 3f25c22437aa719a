"""What Fabric's strategies and the Trainer's of the same name share; the strategies themselves are thin."""
