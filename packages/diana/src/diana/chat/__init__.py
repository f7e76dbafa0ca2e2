"""Searching one's own pictures in a conversation: the index, the questions, the session."""
