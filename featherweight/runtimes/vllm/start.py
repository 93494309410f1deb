"""vLLM's own server, started in half the time: run by the Python of vLLM's toolchain, which has none of our code.

vLLM asks a model class what it can, and computes, in processes that import all anew, for CUDA's sake: some 12 s each on two cores.
On a CPU the one that computes is forked, and the class asked on the spot.

Usage: python start.py ARGUMENT ..., the arguments of vLLM's server
"""

from __future__ import annotations

import multiprocessing


def main() -> None:
    """Serve until told to end."""
    from vllm.entrypoints.launchers.api_server.entry import main as serve
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        import_once()
    serve()


def import_once() -> None:
    """Start no process that imports vLLM anew."""
    from vllm.model_executor.models import registry
    from vllm.v1.engine import utils

    vars(registry)["_run_in_subprocess"] = lambda ask: ask()
    vars(utils)["get_mp_context"] = lambda: multiprocessing.get_context("fork")


if __name__ == "__main__":
    main()
