"""Chat servers on this machine that answer by a rule, to try and test what asks a chat model."""
