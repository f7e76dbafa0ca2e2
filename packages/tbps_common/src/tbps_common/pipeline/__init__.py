"""Long work on many items, killed and run again without loss: stages of files, and a chat model behind any of them.

`run_stage` (stages.py) keeps the output, its side files and the manifest. The work on the items is done by `in_batches`, a
function of a few items at a time, or by `in_conversations` (chat.py), a chat model of any OpenAI-compatible server with
many requests in flight. client.py sends one request until there is an answer; journal.py is the file of JSON lines.
"""

from tbps_common.pipeline.answers import Rejected, final_answer, json_values
from tbps_common.pipeline.chat import Conversation, ask_once, in_conversations
from tbps_common.pipeline.client import BadReply, ChatClient, RequestFailed, ServerRefusal, request_fields
from tbps_common.pipeline.journal import Journal, Record, encode, read_json_lines
from tbps_common.pipeline.stages import (
    Dropped,
    Outcome,
    Shard,
    add_shard_flags,
    begin_manifest,
    finish_manifest,
    in_batches,
    manifest_path,
    read_stage,
    run_stage,
    say,
    shard,
)

__all__ = [
    "BadReply",
    "ChatClient",
    "Conversation",
    "Dropped",
    "Journal",
    "Outcome",
    "Record",
    "Rejected",
    "RequestFailed",
    "ServerRefusal",
    "Shard",
    "add_shard_flags",
    "ask_once",
    "begin_manifest",
    "encode",
    "final_answer",
    "finish_manifest",
    "in_batches",
    "in_conversations",
    "json_values",
    "manifest_path",
    "read_json_lines",
    "read_stage",
    "request_fields",
    "run_stage",
    "say",
    "shard",
]
