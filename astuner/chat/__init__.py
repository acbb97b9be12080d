"""Messages to tokens and back; see `protocol` for the seam.

`load_codec` makes a codec, `normalise` takes in a client's messages, `build_prompt` turns
them into ids with the help of a `History`. No HTTP, no sampling.
"""

from astuner.chat.codec import load_codec
from astuner.chat.detokenizer import Detokenizer
from astuner.chat.history import History, Match
from astuner.chat.messages import normalise
from astuner.chat.prompt import Prompt, build_prompt
from astuner.chat.protocol import ChatCodec, Message, ParsedReply, Tool
from astuner.chat.reply import reply_message

__all__ = [
    "ChatCodec",
    "Detokenizer",
    "History",
    "Match",
    "Message",
    "ParsedReply",
    "Prompt",
    "Tool",
    "build_prompt",
    "load_codec",
    "normalise",
    "reply_message",
]
