"""POST /v1/chat/completions: messages in, an assistant message out, every token recorded.

The prompt extends what was sampled before wherever that is safe (chat/prompt.py).
Each of the `n` choices is a Call of its own. See `tool_choice` for what a free
sampler makes of it, and `wire` for what is refused. Tokens are the engine's
business, their meaning the codec's; this module only joins the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from astuner.chat.messages import normalise
from astuner.chat.prompt import build_prompt
from astuner.chat.reply import reply_message
from astuner.errors import RequestError
from astuner.model_tuner import sampling
from astuner.model_tuner.chat_payload import Answer, Chat, ChatChunks, response_json
from astuner.model_tuner.exchange import Endpoint, Exchange
from astuner.model_tuner.reply import Reply, Turn
from astuner.model_tuner.serving import Serving
from astuner.model_tuner.session import AgentKey
from astuner.model_tuner.stops import StopStrings
from astuner.model_tuner.tool_choice import tool_use
from astuner.model_tuner.wire import ChatRequest, parse_request


class ChatCompletions(Endpoint):
    """The endpoint."""

    def __init__(self, serving: Serving) -> None:
        super().__init__(serving.sessions)
        self._serving = serving
        self._codec = serving.codec

    async def answer(self, agent: AgentKey, exchange: Exchange) -> None:
        data = await exchange.json()
        request = parse_request(ChatRequest, data)
        chunks: ChatChunks | None = None
        with agent.attempts.take(exchange.claim) as attempt:
            if attempt.answered is not None:
                agent.session.count("answered_again")
            else:
                async with exchange.flight(agent):
                    chat = self._understand(agent, request, data)
                    replies = [Reply(chat.turn, i) for i in range(request.n)]
                    if request.stream:
                        chunks = ChatChunks(self._serving, chat, replies, exchange.events)
                    await self._serving.sample(replies, chunks and chunks.grow)
                    attempt.answered = chat, self._record(chat, replies)
        chat, answers = attempt.answered
        if request.stream:
            replies = [answer.reply for answer in answers]
            chunks = chunks or ChatChunks(self._serving, chat, replies, exchange.events)
            await chunks.finish(answers)
        else:
            await exchange.reply(response_json(self._serving, chat, answers))

    def count(self, agent: AgentKey, data: dict[str, Any]) -> int:
        """Tokens of the prompt that this request would have. Raises RequestError."""
        request = parse_request(ChatRequest, data)
        messages, use = normalise(request.messages), tool_use(request)
        return len(build_prompt(self._codec, agent.history, messages, use.tools).ids)

    def _understand(self, agent: AgentKey, request: ChatRequest, data: dict[str, Any]) -> Chat:
        if request.top_logprobs and not request.logprobs:
            raise RequestError("top_logprobs needs logprobs=true.", param="top_logprobs")
        use = tool_use(request)
        messages = normalise(request.messages)
        prompt = build_prompt(self._codec, agent.history, messages, use.tools)
        draw = sampling.resolve(request, agent.session.spec)
        length = sampling.max_tokens(
            request.max_completion_tokens or request.max_tokens,
            agent,
            len(prompt.ids),
            self._serving.engine.max_context,
        )
        if draw.overridden:
            agent.session.count("overridden_sampling")
        turn = Turn(
            agent,
            data,
            prompt.ids,
            sampling.params(draw, length, self._codec.stop_token_ids, request.top_logprobs),
            StopStrings(request.stop, self._codec),
            draw.seed,
            prompt.parent_id,
            prompt.new_timeline_reason,
        )
        return Chat(request, messages, use, turn)

    def _answer_of(self, chat: Chat, reply: Reply) -> Answer:
        turn, use = chat.turn, chat.use
        parsed = self._codec.parse(reply.token_ids, turn.prompt_ids, use.tools)
        message = reply_message(parsed)
        message["content"], stop = turn.stops.cut(message["content"])
        if stop is None and "reasoning_content" in message:
            message["reasoning_content"], stop = turn.stops.cut(message["reasoning_content"])
            message["content"] = "" if stop else message["content"]
        if not message["content"] and "tool_calls" in message:
            message["content"] = None
        finish = "length" if reply.finish == "length" else "stop"
        if "tool_calls" in message and finish == "stop":
            finish = "tool_calls"
        return Answer(reply, message, finish, stop)

    def _record(self, chat: Chat, replies: Sequence[Reply]) -> list[Answer]:
        """Keep the calls, then let later requests continue them."""
        turn, agent = chat.turn, chat.turn.agent
        answers = [self._answer_of(chat, reply) for reply in replies]
        agent.session.record(agent, [(a.reply.number, a.reply.call(a.message)) for a in answers])
        for answer in answers:
            if agent.session.spec.record:
                agent.history.add(
                    chat.messages,
                    chat.use.tools,
                    normalise([answer.message])[0],
                    turn.prompt_ids,
                    answer.reply.token_ids,
                    answer.reply.call_id,
                )
            if not chat.use.met_by(answer.message.get("tool_calls", ())):
                agent.session.count("tool_choice_unmet")
        return answers
