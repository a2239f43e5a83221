"""Perplexity against the share of context dropped, for token policies side by side.

    python benchmarks/token_dropping.py smollm2 --asa --tuned smollm2-asa --text wikitext=test.txt
    python benchmarks/token_dropping.py mini --text books=valid.txt --asa FOLDER --out docs/results/dropping-mini

Each policy reads the same blocks, as it would token by token (one masked forward, see the promise "parallel equals
stepwise"); perplexity is over positions from --from on. The share dropped is measured: of all pairs of a token and an
earlier one, those that the layer no longer held, over the scored positions. An interrupted run goes on where it was.
WikiText's raw spacing (' @-@ ') is undone. Writes OUT.json, a table OUT.md and a plot OUT.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from curves import write_curves
from rich.console import Console
from rich.progress import Progress

import anee
from anee_core.bench.records import Records, ending
from anee_core.evaluation import text_blocks, text_quality

POLICIES = {
    "window": "window:sinks=0,keep={keep}",
    "sinks + window": "window:sinks=4,keep={keep}",
    "H2O": "h2o:keep={keep}",
    "TOVA": "tova:keep={keep}",
    "key norm": "knorm:keep={keep}",
    "SnapKV": "snapkv:keep={keep}",
    "random": "random_tokens:keep={keep}",
}
SHARES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)


def runs(model: str, asa: str | None, shifts: list[float], tuned: str | None) -> list[tuple[str, str, str]]:
    """Return triples of a name, a model and a policy string."""
    made = [("dense", model, "dense")]
    for name, policy in POLICIES.items():
        made += [(name, model, policy.format(keep=round(1 - share, 3))) for share in SHARES]
    if asa is not None:
        made += [("ASA", model, f"asa:{asa + ',' if asa else ''}shift={shift}") for shift in shifts]
    if tuned is not None:
        made += [("dense, tuned", tuned, "dense")]
        made += [("ASA, tuned", tuned, f"asa:shift={shift}") for shift in shifts]
    return made


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", action="append", required=True, help="NAME=FILE; may be repeated")
    parser.add_argument(
        "--asa", nargs="?", const="", help="run asa too, with the weights in a folder or those installed for the model"
    )
    parser.add_argument("--tuned", help="model source with the same weights, but tuned for an asa of its own")
    parser.add_argument("--shift", type=float, nargs="+", default=[0.0], help="shifts of beta to try with each")
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--from", type=int, default=200, dest="first", help="first position that is scored")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", nargs="*", help="names of the policies to run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out/token_dropping"))
    chosen = parser.parse_args()
    sources = [chosen.model, *([chosen.tuned] if chosen.tuned else [])]
    models = {name: anee.load(name, dtype=chosen.dtype, prefill_chunk=chosen.length) for name in sources}
    texts = dict(item.split("=", 1) for item in chosen.text)
    names = ("model", "length", "first", "blocks", "dtype", "asa")
    records = Records(ending(chosen.out, ".json"), {name: getattr(chosen, name) for name in names})
    wanted = [
        (text, name, source, policy)
        for text in texts
        for name, source, policy in runs(chosen.model, chosen.asa, chosen.shift, chosen.tuned)
        if not chosen.only or name in chosen.only or name == "dense"
    ]
    blocks = {t: text_blocks(models[chosen.model], path, chosen.length, chosen.blocks) for t, path in texts.items()}
    with Progress(console=Console(stderr=True)) as bar:
        for text, name, source, policy in bar.track(wanted):
            key = f"{text} {policy}" if source == chosen.model else f"{text} {source} {policy}"
            if key in records:
                continue
            model = models[source]
            model.set_policy(anee.load(model.model, policy).policy)
            quality = text_quality(model, blocks[text], chosen.first, chosen.batch)
            figures = {"perplexity": quality.perplexity, "dropped": quality.dropped}
            bar.console.print(f"{text}: {name}: {policy}: {quality.perplexity:.2f} at {quality.dropped:.1%} dropped")
            records.add(key, {"text": text, "name": name, "policy": policy, **figures})
    read = f"{chosen.blocks} blocks of {chosen.length} tokens, positions {chosen.first} on"
    heading = f"{chosen.model}: {read}, {chosen.dtype}"
    columns = {"dropped": lambda record: f"{record['dropped']:.1%}"}
    write_curves(records, chosen.out, heading, "dropped", "share of context dropped", columns)


if __name__ == "__main__":
    main()
