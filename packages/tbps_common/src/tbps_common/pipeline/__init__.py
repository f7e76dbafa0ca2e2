"""Asking a chat model about many items: any OpenAI-compatible server, a journal that survives a kill, bounded retries.

`ChatClient` sends one request after the other until there is an answer; `run` takes a `Job` (items, what to ask, what
to make of an answer) or `Conversations` (several questions per item) through it; `ask_once` asks a single question. The `openai` package is a dependency of the packages that use this, and is imported
when the first request is made.
"""

from tbps_common.pipeline.client import BadReply, ChatClient, ItemBudget, RequestFailed, ServerRefusal, require_api_key
from tbps_common.pipeline.journal import Journal
from tbps_common.pipeline.runner import Conversation, Conversations, Job, Outcome, Rejected, ask_once, run

__all__ = [
    "BadReply",
    "ChatClient",
    "Conversation",
    "Conversations",
    "ItemBudget",
    "Job",
    "Journal",
    "Outcome",
    "Rejected",
    "RequestFailed",
    "ServerRefusal",
    "ask_once",
    "require_api_key",
    "run",
]
