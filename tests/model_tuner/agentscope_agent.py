"""A one-tool agent in AgentScope 1.0.x and 2.x, for the test that needs the real package."""

from __future__ import annotations

from typing import Any

import agentscope
import openai


def reads_streams() -> bool:
    """AgentScope 1.0.x trips over the null `audio` of openai 3's stream deltas."""
    return not (_is_v1() and int(openai.__version__.split(".")[0]) >= 3)


def _is_v1() -> bool:
    return agentscope.__version__.startswith("1.")


async def ask_agent(model: Any, question: str) -> str:
    """What an agent with an `add` tool answers."""
    ask = _ask_v1 if _is_v1() else _ask_v2
    return await ask(model, question)


async def _ask_v1(model: Any, question: str) -> str:
    from agentscope.agent import ReActAgent
    from agentscope.formatter import OpenAIChatFormatter
    from agentscope.message import Msg, TextBlock
    from agentscope.tool import Toolkit, ToolResponse

    def add(a: int, b: int) -> ToolResponse:
        """Add two numbers.

        Args:
            a (int): one
            b (int): the other
        """
        return ToolResponse(content=[TextBlock(type="text", text=str(a + b))])

    toolkit = Toolkit()
    toolkit.register_tool_function(add)
    agent = ReActAgent(
        name="solver",
        sys_prompt="You add.",
        model=model,
        formatter=OpenAIChatFormatter(),
        toolkit=toolkit,
    )
    agent.set_console_output_enabled(False)
    answer = await agent(Msg("user", question, "user"))
    return answer.get_text_content() or ""


async def _ask_v2(model: Any, question: str) -> str:
    from agentscope.agent import Agent
    from agentscope.message import TextBlock, UserMsg
    from agentscope.permission import PermissionBehavior, PermissionDecision
    from agentscope.tool import FunctionTool, ToolChunk, Toolkit

    def add(a: int, b: int) -> ToolChunk:
        """Add two numbers."""
        return ToolChunk(content=[TextBlock(text=str(a + b))])

    allowed = PermissionDecision(PermissionBehavior.ALLOW, "a test")
    toolkit = Toolkit(tools=[FunctionTool(add, permission=allowed)])
    agent = Agent(name="solver", system_prompt="You add.", model=model, toolkit=toolkit)
    answer = await agent.reply(UserMsg("user", question))
    return answer.get_text_content() or ""
