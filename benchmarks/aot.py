"""Memory and FLOPs of a training gradient, compiled ahead of time for a TPU v5e chip (no TPU: pip install libtpu).

    python -m benchmarks.aot [--layers 8] [--width 2048] [--batch 4] [--length 1024] [--rank 32] [--remat full]

The figures are XLA's own (`memory_analysis`, `cost_analysis`; the body of the layer loop is counted once) and do not
vary from run to run. The base is bfloat16, the factors float32, the gradient that of the adapters.
"""

import argparse
import os

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import hadamax as hx
from hadamax.models import Decoder, DecoderConfig


def compiled(model, adapter, batch, length, sharding):
    """The compiled gradient of the mean loss by the adapters' factors."""
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    weights = jax.ShapeDtypeStruct((batch, length), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    injection = hx.inject({"*_proj": adapter}, view=model.view)
    adapters = jax.eval_shape(injection.init, jax.random.key(0), params)
    apply = injection.apply(model.apply)

    def loss(adapters, params, ids, weights):
        total, count = apply(params, adapters, ids, ids, weights, method="loss")
        return total / count

    return jax.jit(jax.grad(loss), in_shardings=sharding).lower(adapters, params, ids, weights).compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 8, "width": 2048, "batch": 4, "length": 1024, "rank": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--methods", default="lora,hira,boha,abba,abba-merged,hadamard", help="comma-separated")
    args = parser.parse_args()
    config = DecoderConfig(
        vocab_size=32000,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 128,
        num_key_value_heads=args.width // 128,
        head_dim=128,
    )
    model = Decoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat=args.remat)
    adapters = {
        "lora": hx.lora(args.rank),
        "hira": hx.hira(args.rank),
        "boha": hx.boha(args.rank, 4),
        "abba": hx.abba(args.rank),
        "abba-merged": hx.abba(args.rank, forward="merged"),
        "hadamard": hx.hadamard_adapter(),
    }
    chip = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[:1]
    sharding = NamedSharding(Mesh(np.array(chip), ("chip",)), PartitionSpec())
    print(f"{args}\n{'method':12} {'arguments MiB':>14} {'temporaries MiB':>16} {'TFLOP':>8}")
    for name in args.methods.split(","):
        program = compiled(model, adapters[name], args.batch, args.length, sharding)
        memory, flops = program.memory_analysis(), program.cost_analysis()["flops"]
        arguments, temporaries = (size / 2**20 for size in (memory.argument_size_in_bytes, memory.temp_size_in_bytes))
        print(f"{name:12} {arguments:14.0f} {temporaries:16.0f} {flops / 1e12:8.3f}", flush=True)


if __name__ == "__main__":
    main()
