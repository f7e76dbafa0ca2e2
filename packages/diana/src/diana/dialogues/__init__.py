"""Building dialogues with a language model: the two roles, and the command."""
