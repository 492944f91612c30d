"""Shrink a training run to the one file that ships: config and averaged weights, in half precision.

    python -m toy.export runs/toy toy/weights/magnet.pt
"""

from pathlib import Path

from cli import Parser, run, save_whole
from model import read_checkpoint


def main():
    parser = Parser(description="export a training run as a small model file")
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    kept = ("config", "model_config", "codec", "text_encoder", "codec_id", "text_encoder_id", "step")
    content = read_checkpoint(args.run / "checkpoint.pt", (*kept, "ema"))
    small = {key: content[key] for key in kept}
    small["ema"] = {name: tensor.half() for name, tensor in content["ema"].items()}
    save_whole(small, args.out)
    print(f"wrote {args.out}: {args.out.stat().st_size / 1e6:.1f} MB, step {content['step']}")


if __name__ == "__main__":
    run(main)
