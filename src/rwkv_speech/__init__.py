"""Speech for frozen RWKV language models."""
