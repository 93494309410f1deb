"""vLLM's own server, whose texts end where the checkpoint ends them and with what it ends them: run by the Python of vLLM's
toolchain, which has none of our code.

vLLM ends a text at its tokenizer's end too, and leaves the token that ends one out, special or not; transformers does neither.

Usage: python own_ends.py ARGUMENT ..., the arguments of vLLM's server
"""

from __future__ import annotations


def main() -> None:
    """Serve until told to end."""
    from vllm.entrypoints.launchers.api_server.entry import main as serve
    from vllm.renderers import base
    from vllm.v1.engine import detokenizer

    reader = vars(detokenizer)["BaseIncrementalDetokenizer"]
    update = reader.update
    reader.update = lambda self, ids, stopped: update(self, ids, False)
    vars(base)["BaseRenderer"].get_eos_token_id = lambda self: None
    serve()


if __name__ == "__main__":
    main()
