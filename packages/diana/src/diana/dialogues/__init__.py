"""Building dialogues with a language model: a client that survives bad servers, the two roles, and the journal."""
