"""vLLM's OpenAI server with Model Runner V2, by Triton's interpreter: in the place of `vllm serve`.

The processes of its engine and its worker come through here too, before they begin.
"""

import interpreted

interpreted.without_the_kernel()

if __name__ == "__main__":
    from runpy import run_module

    from vllm import collect_env

    # /server_info lists packages by pip, which an environment made by uv does not have.
    collect_env.get_pip_packages = lambda *_: ("pip", "")
    run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
