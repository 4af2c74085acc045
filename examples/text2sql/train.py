"""Train the small shop model: a Llama of 3 million parameters, from nothing, on the CPU.

All of it is drawn from the shop grammar: the tokenizer, and examples of every stage of the
workflow (keywords, both ways to generate, revise, unit tests, judging). The wordings that the
grammar reserves and the questions of the held-out file never occur. One thread and one seed give
the same weights again on the same machine and library versions.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_workflow.text2sql.shop.roles import Example, ExampleStream

HERE = Path(__file__).parent
PAD, BOS, EOS, USER, ASSISTANT = range(5)
SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""System messages are dropped: the model has never seen one."""

PRE_TOKENS = "|".join(
    (
        r" JOIN \w+ ON [\w.]+ = [\w.]+",
        r" NOT IN \(SELECT \w+ FROM \w+\)",
        r" \(SELECT AVG\(\w+\) FROM \w+\)",
        r"SUM\(order_items\.quantity \* order_items\.unit_price\)",
        r"SELECT COUNT\(\*\) FROM|, COUNT\(\*\) FROM",
        r"(?:COUNT|SUM|AVG|MIN|MAX)\([\w.*]+\)",
        r" (?:GROUP BY|ORDER BY|LIMIT|WHERE|HAVING|AND|FROM|DESC|ASC|BETWEEN) ?",
        r"SELECT(?: DISTINCT)?|-- tables:|no such (?:column|table):|\nHint: |\nQuery: |\nResult: ",
        r"\n\d: SELECT|\n\d: (?:pass|fail)",
        r"\n(?:selects|reads|filters|groups by|orders by|returns) ",
        r" ?[A-Za-z_]+\.[A-Za-z_]+",
        r" (?:=|<>|<|>) '?",
        r" ?[a-z_]+",
        r"[A-Z][A-Za-z_]*",
        r"\d+",
        r"'",
        r"\s",
        r" ?[^\sA-Za-z_\d']+",
    )
)
"""One pre-token per phrase of SQL, qualified column, number and word.

A query takes 12 to 14 tokens instead of 43, and a name or a number is the same token in the
question and in the query, so that copying it is one step.
"""

HEAD_DIM = 64
WARMUP_STEPS = 100
CHUNK = 2048
"""Examples that are sorted by length together before they are cut into batches."""


def trained_tokenizer(stream: ExampleStream, num_examples: int, vocab: int) -> Any:
    """Return a byte-level BPE tokenizer with the chat template of the small model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = (
        text
        for _, example in zip(range(num_examples), stream, strict=False)
        for text in (example.messages[0]["content"], example.answer)
    )
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[BOS],
        eos_token=SPECIAL_TOKENS[EOS],
        pad_token=SPECIAL_TOKENS[PAD],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def new_model(args: argparse.Namespace, vocab: int) -> LlamaForCausalLM:
    """Return a model with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // HEAD_DIM,
            num_key_value_heads=max(1, args.hidden // HEAD_DIM // 2),
            head_dim=HEAD_DIM,
            intermediate_size=args.hidden * 5 // 2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
            rms_norm_eps=1e-5,
        )
    )


def encoded(tokenizer: Any, example: Example) -> tuple[list[int], int]:
    """Return the tokens of prompt and answer and how many belong to the prompt."""
    content = example.messages[0]["content"]
    prompt = [BOS, USER, *tokenizer.encode(content, add_special_tokens=False), ASSISTANT]
    answer = [*tokenizer.encode(example.answer, add_special_tokens=False), EOS]
    return prompt + answer, len(prompt)


def batches(
    stream: ExampleStream, tokenizer: Any, tokens_per_batch: int, rng: random.Random
) -> Iterator[list[tuple[list[int], int]]]:
    """Yield batches of similar length, in random order, without end."""
    examples = iter(stream)
    while True:
        chunk = [encoded(tokenizer, next(examples)) for _ in range(CHUNK)]
        chunk.sort(key=lambda entry: len(entry[0]))
        cut: list[list[tuple[list[int], int]]] = [[]]
        for entry in chunk:
            if len(entry[0]) * (len(cut[-1]) + 1) > tokens_per_batch and cut[-1]:
                cut.append([])
            cut[-1].append(entry)
        rng.shuffle(cut)
        yield from cut


def loss_of(model: LlamaForCausalLM, batch: list[tuple[list[int], int]]) -> torch.Tensor:
    """Return the mean cross-entropy of the answer tokens of a batch.

    Prompts are on the left and padding on the right, so causal attention needs no mask.
    """
    width = max(len(tokens) for tokens, _ in batch)
    inputs = torch.full((len(batch), width), PAD)
    labels = torch.full((len(batch), width), -100)
    for row, (tokens, num_prompt) in enumerate(batch):
        inputs[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, num_prompt : len(tokens)] = torch.tensor(tokens[num_prompt:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=inputs).last_hidden_state
        counted = labels[:, 1:] != -100
        logits = model.lm_head(hidden[:, :-1][counted])
    return F.cross_entropy(logits.float(), labels[:, 1:][counted])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return a rate that rises for the first steps and then falls to zero on a line."""
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / steps)


def optimizer_of(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train, save to `args.out` and return what is known about the run."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    held_out = {json.loads(line)["question"] for line in args.held_out.read_text().splitlines()}
    sample = ExampleStream(args.seed + 1000, held_out=held_out)
    tokenizer = trained_tokenizer(sample, min(20_000, args.steps * 40), args.vocab)
    model = new_model(args, len(tokenizer)).train()
    optimizer = optimizer_of(model)
    stream = ExampleStream(args.seed, held_out=held_out)
    source = batches(stream, tokenizer, args.tokens_per_batch, random.Random(args.seed))
    started_s, cpu_started_s, smoothed, first = time.monotonic(), time.process_time(), 0.0, 0.0
    num_examples = num_tokens = 0
    progress = tqdm(range(args.steps), desc="training", mininterval=args.progress_s)
    for step in progress:
        batch = next(source)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        loss = loss_of(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smoothed = loss.item() if step == 0 else 0.98 * smoothed + 0.02 * loss.item()
        first = first or loss.item()
        num_examples += len(batch)
        num_tokens += sum(len(tokens) for tokens, _ in batch)
        progress.set_postfix(loss=f"{smoothed:.4f}", refresh=False)
    info = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": args.steps,
        "examples": num_examples,
        "tokens": num_tokens,
        "first_loss": round(first, 4),
        "last_loss": round(smoothed, 4),
        "cpu_seconds": round(time.process_time() - cpu_started_s),
        "wall_seconds": round(time.monotonic() - started_s),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "arguments": {
            name: value for name, value in sorted(vars(args).items()) if not isinstance(value, Path)
        },
    }
    save(model, tokenizer, info, args.out)
    return info


def save(model: LlamaForCausalLM, tokenizer: Any, info: dict[str, Any], out: Path) -> None:
    """Write weights in bfloat16, tokenizer and `train_info.json` as transformers expects them."""
    model.eval().to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "train_info.json").write_text(json.dumps(info, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    cli.add_argument("--out", type=Path, default=HERE / "model", help="folder to write to")
    cli.add_argument(
        "--steps",
        type=int,
        default=5500,
        help="optimizer steps, at least 1; 60 show in half a minute that the loss falls, the "
        "default takes about half an hour of one CPU core",
    )
    cli.add_argument("--seed", type=int, default=1, help="seed of weights, examples and order")
    cli.add_argument(
        "--held-out",
        type=Path,
        default=HERE / "questions.jsonl",
        help="questions that must not occur in training, one JSON object per line",
    )
    cli.add_argument(
        "--threads",
        type=int,
        default=1,
        help="threads of torch; with more than 1 the weights may differ in the last bits",
    )
    cli.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    cli.add_argument(
        "--tokens-per-batch", type=int, default=2048, help="most tokens in a batch, with padding"
    )
    cli.add_argument("--vocab", type=int, default=2560, help="most entries of the tokenizer")
    cli.add_argument("--layers", type=int, default=4, help="transformer layers")
    cli.add_argument("--hidden", type=int, default=256, help="width, a multiple of 64")
    cli.add_argument(
        "--progress-s", type=float, default=5.0, help="seconds between lines of progress"
    )
    return cli


if __name__ == "__main__":
    print(json.dumps(train(parser().parse_args()), indent=1))
