"""Captions for edited images, written by a chat model from the original captions."""

from dp_gen.annotation.prompts import build_prompt, reject_response
from dp_gen.annotation.rows import Row, read_rows, select_rows

__all__ = ["Row", "build_prompt", "read_rows", "reject_response", "select_rows"]
