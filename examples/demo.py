"""`make demo`: make the bundled model ten times smaller, reload and measure it in fresh processes, let it tell a story.

Every step is a command that you could type yourself; it is printed before it runs.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tinystories-3.7m"
ARTIFACT = ROOT / "demo-artifact"
TARGET = "10x"
# Less than the defaults of 131,072 and 240, so that it takes two or three minutes on two cores.
EFFORT = ("--calibration-tokens", "65536", "--tune", "60")
PROMPT = "Once upon a time there was a little"

console = Console(highlight=False)


def tenpak(*arguments: str | Path) -> dict:
    """Run one tenpak command with --json in a process of its own and return what it printed."""
    shown = [str(a.relative_to(ROOT)) if isinstance(a, Path) else a for a in arguments]
    console.print(f"[bold]$ tenpak {shlex.join(shown)}[/bold]", soft_wrap=True)
    command = [sys.executable, "-m", "tenpak", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def main() -> None:
    options = ("--target", TARGET, *EFFORT, "--evaluation", "none", "--overwrite")
    report = tenpak("compress", MODEL, "-o", ARTIFACT, *options)
    tenpak("verify", ARTIFACT)
    quality = tenpak("evaluate", ARTIFACT, "--against", MODEL, "--memory")
    sampling = ("--prompt", PROMPT, "--tokens", "90", "--temperature", "0.7", "--seed", "11")
    stories = {
        "original": tenpak("generate", MODEL, *sampling),
        f"compressed, {quality['ratio_fp32']:.1f}× smaller than FP32": tenpak("generate", ARTIFACT, *sampling),
    }
    console.print()
    console.print(figures(report, quality))
    for name, story in stories.items():
        console.print(Panel(story["prompt"] + story["continuation"], title=name, title_align="left"))
    console.print(f"The compressed model is in {ARTIFACT.relative_to(ROOT)}/ (its README.md is the model card).")


def figures(report: dict, quality: dict) -> Table:
    """Original and compressed side by side."""
    table = Table("", "original", "compressed", box=None, header_style="bold", padding=(0, 3, 0, 0))
    fp32 = 4 * report["parameters"]
    checkpoint = report["checkpoint_bytes"]
    table.add_row("bytes of weight files", f"{checkpoint:,}", f"{quality['bytes']:,}")
    table.add_row("smaller than the checkpoint", "", f"{quality['ratio_checkpoint']:.2f}×")
    table.add_row("smaller than FP32", f"{fp32 / checkpoint:.2f}×", f"{quality['ratio_fp32']:.2f}×")
    table.add_row("bits per weight", f"{8 * checkpoint / report['parameters']:.2f}", f"{quality['bpw']:.3f}")
    table.add_row("perplexity", f"{quality['ppl_original']:.4f}", f"{quality['ppl']:.4f}")
    change = f"{quality['ppl_increase']:+.2%} ± {quality['ppl_increase_se']:.2%}"
    table.add_row("perplexity increase", "", change)
    table.add_row("KL divergence, nats per token", "", f"{quality['kl']:.5f} ± {quality['kl_se']:.5f}")
    table.add_row("top-1 agreement", "", f"{quality['top1']:.2%}")
    held = {name: (found["after_forward"] - found["baseline"]) / 1e6 for name, found in quality["memory"].items()}
    table.add_row("resident memory in use", *(f"{held[name]:.1f} MB" for name in ("original", "runtime memory")))
    table.add_row("measured on", "", f"{quality['text']}, {quality['tokens']:,} tokens, {quality['dtype']}")
    return table


if __name__ == "__main__":
    main()
