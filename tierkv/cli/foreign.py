"""Flags of other servers that `tierkv serve` does not have, and what to use instead.

The tables are data: `flag,alias,...` to advice. A flag in `SAME_HERE` is taken when its value says
what happens here anyway; an empty tuple is a switch. Names that mean the same here, such as
`--max-model-len`, are not here: they are options.
"""

from __future__ import annotations

from collections.abc import Iterator

_ANY_DEVICES = "start one server for each device, and balance between them"
_LOADER = "weights are read as transformers reads them: leave it out"
_NO_PLUGINS = "only policies can be plugged in, by name: see --eviction-policy"
_REQUESTS_SAY = "requests say how to sample: leave it out"
_NO_ADAPTERS = "adapters are not served: merge the adapter into the weights and serve those"
_NO_DRAFT = "there is no speculative decoding"
_NOT_COMPILED = "nothing is compiled: leave it out; for CUDA graphs see --cuda-graph-sizes"
_ONE_HOST = "the GPUs of one machine share a model by --tensor-parallel-size: leave it out"
_NO_PIPELINE = "layers are not spread over GPUs: use --tensor-parallel-size"
_PROXY = "leave that to a proxy in front of the server"
_TEXT_ONLY = "only text is served: leave it out"
_MODEL_DECIDES = "the model's config.json decides: leave it out"

SHARED = {
    "--attention-backend": "the device and the model decide: leave it out",
    "--grammar-backend,--guided-decoding-backend": "there is one: leave it out",
    "--kv-cache-dtype": "KV is kept in the model's dtype: see --dtype",
    "-q": "use --quantization",
    "--reasoning-parser": "reasoning is not told from the answer: leave it out",
}

VLLM = {
    "--additional-config": "there is nothing to configure: leave it out",
    "--allowed-origins,--allowed-methods,--allowed-headers,--allow-credentials": _PROXY,
    "--api-server-count,-asc": "there is one front end: leave it out",
    "--num-scheduler-steps": "leave it out: see --async-scheduling",
    "--calculate-kv-scales": "KV is kept in the model's dtype: leave it out",
    "--code-revision,--tokenizer-revision": "use --revision, which is for all files of the model",
    "--collect-detailed-traces": "use --otlp-traces-endpoint alone",
    "--compilation-config,-O": _NOT_COMPILED,
    "--cudagraph-capture-sizes,--max-cudagraph-capture-size": "use --cuda-graph-sizes",
    "--max-seq-len-to-capture": "graphs are for contexts of any length: leave it out",
    "--cpu-offload-gb": "weights are not offloaded; for KV use --offload cpu=SIZE",
    "--chat-template-content-format": "templates get the content of a message as text",
    "--config-format,--hf-config-path": _MODEL_DECIDES,
    "--data-parallel-size,-dp": _ANY_DEVICES,
    "--data-parallel-address,--data-parallel-backend,--data-parallel-rank": _ANY_DEVICES,
    "--data-parallel-rpc-port,--data-parallel-size-local,--data-parallel-start-rank": _ANY_DEVICES,
    "--decode-context-parallel-size,-dcp": _ONE_HOST,
    "--disable-chunked-mm-input,--limit-mm-per-prompt,--mm-processor-kwargs": _TEXT_ONLY,
    "--allowed-local-media-path,--media-io-kwargs,--mm-processor-cache-gb": _TEXT_ONLY,
    "--disable-fastapi-docs": _PROXY,
    "--disable-frontend-multiprocessing": "front end and engine are two processes: leave it out",
    "--disable-hybrid-kv-cache-manager": "there is one kind of block: leave it out",
    "--distributed-executor-backend": _ONE_HOST,
    "--disable-sliding-window,--hf-overrides,--rope-scaling,--rope-theta": _MODEL_DECIDES,
    "--download-dir": "set HF_HOME in the environment",
    "--enable-expert-parallel": _ONE_HOST,
    "--enable-dbo,--enable-eplb,--headless,--master-addr,--master-port": _ONE_HOST,
    "--enable-force-include-usage": "requests say stream_options.include_usage: leave it out",
    "--enable-log-outputs": "answers are never logged: leave it out",
    "--enable-prompt-embeds": "prompts are text or token ids: leave it out",
    "--enable-tokenizer-info-endpoint": "see /tokenize and /v1/models",
    "--enable-lora,--lora-modules,--max-loras,--max-lora-rank,--max-cpu-loras": _NO_ADAPTERS,
    "--fully-sharded-loras,--lora-dtype,--lora-extra-vocab-size": _NO_ADAPTERS,
    "--generation-config,--override-generation-config": _REQUESTS_SAY,
    "--h11-max-header-count,--h11-max-incomplete-event-size": _PROXY,
    "--hf-token": "set HF_TOKEN in the environment",
    "--ignore-patterns,--model-loader-extra-config,--use-tqdm-on-load": _LOADER,
    "--io-processor-plugin,--logits-processors,--scheduler-cls,--worker-cls": _NO_PLUGINS,
    "--kv-events-config": "see /dashboard/events, or `tierkv top`",
    "--kv-cache-memory-bytes": "use --kv-cache-memory",
    "--kv-offloading-size,--kv-offloading-backend": "use --offload cpu=SIZE",
    "--kv-transfer-config": "use --offload cpu=SIZE,nvme=SIZE:PATH",
    "--long-prefill-token-threshold": "use --max-num-batched-tokens",
    "--log-config-file": "use --log-format and --uvicorn-log-level",
    "--logprobs-mode,--max-logprobs": "requests say which, and how many: leave it out",
    "--max-log-len": "prompts are never logged: leave it out",
    "--max-parallel-loading-workers": _ONE_HOST,
    "--max-num-partial-prefills,--max-long-partial-prefills": "use --max-num-batched-tokens",
    "--no-enable-chunked-prefill": "long prompts are always computed in chunks: see"
    " --max-num-batched-tokens",
    "--num-gpu-blocks-override": "use --num-gpu-blocks",
    "--num-lookahead-slots": _NO_DRAFT,
    "--pipeline-parallel-size,-pp": _NO_PIPELINE,
    "--pooler-config,--override-pooler-config,--convert": "text is generated: leave it out",
    "--prefix-caching-hash-algo": "there is one: leave it out",
    "--response-role": "answers are from the assistant: leave it out",
    "--root-path,--middleware": _PROXY,
    "--show-hidden-metrics-for-version": "all metrics are shown: leave it out",
    "--skip-tokenizer-init": "a model without a tokenizer is served as it is: leave it out",
    "--speculative-config,-sc,--speculative-model,--num-speculative-tokens": _NO_DRAFT,
    "--ssl-keyfile,--ssl-certfile,--ssl-ca-certs,--ssl-cert-reqs": _PROXY,
    "--enable-ssl-refresh,--ssl-ciphers": _PROXY,
    "--structured-outputs-config": "there is nothing to configure: leave it out",
    "--swap-space": "use --offload cpu=SIZE: swapped and cached KV share that tier",
    "--task,--runner": "text is generated: leave it out",
    "--tokenizer-mode": "the tokenizer is transformers' fast one: leave it out",
    "--tool-server": "clients call tools: leave it out",
    "--trust-request-chat-template": "requests cannot bring a template: see --chat-template",
    "--tool-parser-plugin": "use --tool-call-parser with one that is built in",
    "--uds": "use --host and --port",
    "--use-v2-block-manager": "leave it out: there is one",
}

SGLANG = {
    "--chunked-prefill-size,--max-prefill-tokens": "use --max-num-batched-tokens",
    "--context-length": "use --max-model-len",
    "--enable-torch-compile,--enable-nccl-nvls": _NOT_COMPILED,
    "--disable-radix-cache": "use --no-enable-prefix-caching",
    "--cuda-graph-max-bs,--cuda-graph-bs": "use --cuda-graph-sizes",
    "--disable-cuda-graph-padding": "use --cuda-graph-sizes, or --enforce-eager for no graphs",
    "--enable-mixed-chunk": "chunks and decode rows are mixed always: leave it out",
    "--dist-init-addr,--nnodes,--node-rank,--ep-size,--enable-dp-attention": _ONE_HOST,
    "--dp-size,--dp": _ANY_DEVICES,
    "--enable-lmcache": "use --offload cpu=SIZE,nvme=SIZE:PATH",
    "--enable-hierarchical-cache": "use --offload cpu=SIZE, or --offload auto as by default",
    "--hicache-io-backend,--hicache-mem-layout": "there is one: leave it out",
    "--hicache-ratio,--hicache-size": "use --offload cpu=SIZE",
    "--hicache-storage-backend,--hicache-storage-backend-extra-config": "use"
    " --offload cpu=SIZE,nvme=SIZE:PATH",
    "--hicache-storage-prefetch-policy": "use --prefetch-policy",
    "--hicache-write-policy": "use --admission-policy",
    "--json-model-override-args": _MODEL_DECIDES,
    "--log-level,--log-level-http": "use --uvicorn-log-level",
    "--log-requests-level": "prompts are never logged: use --log-requests",
    "--lora-paths": _NO_ADAPTERS,
    "--max-queued-requests": "use --max-waiting",
    "--max-running-requests": "use --max-num-seqs",
    "--max-total-tokens": "use --num-gpu-blocks: that many tokens divided by --block-size",
    "--mem-fraction-static": "use --gpu-memory-utilization, or --kv-cache-memory for a size",
    "--model-path": "give it as MODEL",
    "--page-size": "use --block-size",
    "--pp-size": f"{_NO_PIPELINE} (1 is accepted)",
    "--tp-size,--tp": "use --tensor-parallel-size (1 is accepted)",
    "--radix-eviction-policy": "use --eviction-policy",
    "--random-seed": "use --seed",
    "--sampling-backend": "there is one: leave it out",
    "--schedule-conservativeness": "use --oversubscribe to run more than fits; else leave it out",
    "--schedule-policy": "use --scheduling-policy",
    "--speculative-algorithm,--speculative-draft-model-path": _NO_DRAFT,
    "--stream-interval": "each token is sent as it comes: leave it out",
    "--tokenizer-path": "use --tokenizer",
    "--watchdog-timeout": "use --request-timeout",
}

LLAMA_CPP = {
    "--temp,--top-k,--top-p,--min-p,--repeat-penalty,--samplers": _REQUESTS_SAY,
    "--grammar,--grammar-file,--json-schema": "requests give a response_format: leave it out",
    "--cache-prompt": "prefixes are cached unless --no-enable-prefix-caching says otherwise",
    "--no-cache-prompt": "use --no-enable-prefix-caching",
    "--ctx-checkpoints,--swa-full,--kv-unified,-kvu": "there is one kind of block: leave it out",
    "--defrag-thold,-dt": "blocks are paged, nothing is to be defragmented: leave it out",
    "--embedding,--embeddings,--pooling,--rerank,--reranking": "text is generated: leave it out",
    "--log-disable,--log-file,--log-verbosity,-lv": "see --log-format and --uvicorn-log-level",
    "--main-gpu,-mg,--split-mode,-sm,--tensor-split,-ts": "use --tensor-parallel-size, or set"
    " CUDA_VISIBLE_DEVICES",
    "--mmproj": _TEXT_ONLY,
    "--no-cont-batching,-nocb": "requests always run together: use --max-num-seqs 1",
    "--no-webui,--path": "see /dashboard; a proxy in front of the server may hide it",
    "--rope-freq-base,--rope-freq-scale,--rope-scale": _MODEL_DECIDES,
    "--threads-http": "there is one front end: leave it out",
    "--alias,-a": "use --served-model-name",
    "--api-key-file": "use --api-keys, which says whose they are; or --api-key",
    "--batch-size,--ubatch-size,-b,-ub": "use --max-num-batched-tokens",
    "--cache-ram,-cram": "use --offload cpu=SIZE",
    "--cache-reuse": "prefixes are reused as they are: leave it out",
    "--cache-type-k,--cache-type-v,-ctk,-ctv": "KV is kept in the model's dtype: see --dtype",
    "--chat-template-file": "use --chat-template, which takes a file too",
    "--ctx-size,-c": "use --max-model-len for one sequence, --kv-cache-memory for the pool",
    "--flash-attn,-fa": "the device and the model decide: leave it out",
    "--gpu-layers,--n-gpu-layers,-ngl": "use --device cuda (all layers) or --device cpu",
    "--hf-repo,-hf,-hfr": "give the hub id as MODEL",
    "--lora": _NO_ADAPTERS,
    "--model-draft,-md": _NO_DRAFT,
    "--model-url,-mu,-m": "give a Hugging Face directory or a hub id as MODEL; GGUF is not read",
    "--mlock,--no-mmap,--numa": "leave it out: weights are loaded into memory",
    "--no-kv-offload,-nkvo": "use --device cpu to keep all KV in CPU memory",
    "--parallel,-np": "use --max-num-seqs",
    "--predict,--n-predict,-n": "requests say max_tokens: leave it out",
    "--slot-prompt-similarity,-sps": "any request may use any cached prefix: leave it out",
    "--slot-save-path": "use --offload cpu=SIZE,nvme=SIZE:PATH: prompts are kept without asking",
    "--slots": "see /metrics",
    "--threads,--threads-batch,-t,-tb": "use --num-threads",
    "--timeout,-to": "use --request-timeout",
}

TABLES = {
    "vLLM": VLLM,
    "SGLang": SGLANG,
    "llama.cpp": LLAMA_CPP,
    "other servers": SHARED,
}

SAME_HERE: dict[str, tuple[str, ...]] = {
    "--api-server-count,-asc": ("1",),
    "--chat-template-content-format": ("auto", "string"),
    "--cont-batching,-cb": (),
    "--data-parallel-size,-dp": ("1",),
    "--disable-cascade-attn": (),
    "--disable-custom-all-reduce": (),
    "--disable-log-stats": (),
    "--disable-uvicorn-access-log": (),
    "--dp-size,--dp": ("1",),
    "--enable-cache-report": (),
    "--enable-chunked-prefill": (),
    "--enable-metrics": (),
    "--enable-prompt-tokens-details": (),
    "--enable-request-id-headers": (),
    "--enable-server-load-tracking": (),
    "--enable-sleep-mode": (),
    "--jinja": (),
    "--kv-cache-dtype": ("auto",),
    "--metrics": (),
    "--pipeline-parallel-size,-pp": ("1",),
    "--pp-size": ("1",),
    "--tp-size,--tp": ("1",),
    "--runner": ("auto", "generate"),
    "--skip-server-warmup": (),
    "--task": ("auto", "generate"),
    "--tokenizer-mode": ("auto",),
}
"""What is so here too, always: accepted, and nothing changes."""

SWITCHES = {
    "--disable-cuda-graph": ("enforce_eager", True),
    "--disable-overlap-schedule": ("async_scheduling", False),
    "--disable-log-requests": ("log_requests", False),
    "--enable-log-requests": ("log_requests", True),
}
"""Other names of switches: the option that each sets, and to what."""


def advice() -> dict[str, str]:
    """Each flag of the tables: whose it is, and what to do instead."""
    return {
        flag: f"is an option of {owner}: {text}"
        for owner, table in TABLES.items()
        for flags, text in table.items()
        for flag in flags.split(",")
    }


def accepted() -> dict[str, tuple[str, ...]]:
    """Each flag that may be given, with its values; none for a switch."""
    return {flag: values for flags, values in SAME_HERE.items() for flag in flags.split(",")}


def all_flags() -> Iterator[str]:
    """Every flag that is known here, each once."""
    yield from dict.fromkeys([*advice(), *accepted(), *SWITCHES])
