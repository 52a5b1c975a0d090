"""What MMEngine needs beside hooks: the config key, and checkpoints."""
