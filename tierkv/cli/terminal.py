"""What the terminal commands share: a quiet model, and text that appears while it is made."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tierkv.engine.llm import LLM
    from tierkv.engine.sampling_params import SamplingParams


def load(**options: Any) -> LLM:
    """An `LLM` in this process, without progress bars on the terminal.

    Raises:
        ConfigError: an option is wrong.
    """
    from transformers.utils.logging import disable_progress_bar

    from tierkv.engine.llm import LLM

    disable_progress_bar()
    return LLM(**options)


def stream_text(llm: LLM, prompt: str | dict[str, Any], params: SamplingParams) -> tuple[str, bool]:
    """Print an answer while it is generated; Ctrl-C ends the answer, not the program.

    Returns:
        The text, and whether it was interrupted.
    """
    text = ""
    outputs = llm.stream(prompt, params)
    try:
        for output in outputs:
            whole = output.outputs[0].text
            sys.stdout.write(whole[len(text) :])
            sys.stdout.flush()
            text = whole
    except KeyboardInterrupt:
        return text, True
    finally:
        del outputs  # lets the request go if it still runs
    return text, False
