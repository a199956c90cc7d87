"""
One answer from several input contexts at once: the example of the paper's Appendix A (Table 4).

Each choice of a multiple-choice question is a context of its own. One answer attends to all of them, once per weighting. Standard
inference, one prompt with all choices, comes first for comparison:

    python examples/generate_multi_context.py --model meta-llama/Meta-Llama-3-8B-Instruct

In the paper's example Llama 3 8B writes no fluent answer under "vanilla" (set-prompt's single softmax, eq. 4) and does under "fid"
(eq. 7). docs/generation.md has what was measured on two small models. Without `--model` a tiny random model writes gibberish, offline,
in a few seconds: a check that everything runs.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_miso.generation import miso_generate
from trl_miso.segments.packed import WEIGHTINGS
from trl_miso.sources.synthetic import build_model, build_tokenizer, synthetic_rows

TEMPLATE = "A lesion causing compression of the facial nerve at the stylomastoid foramen will cause ipsilateral {choice} Answer:"
CHOICES = [
    "1. paralysis of the facial muscles.",
    "2. paralysis of the facial muscles and loss of taste.",
    "3. paralysis of the facial muscles, loss of taste and lacrimation.",
    "4. paralysis of the facial muscles, loss of taste, lacrimation and decreased salivation.",
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", "--model_name_or_path", help="any causal language model (default: a tiny random one)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--do_sample", action="store_true", help="sample instead of taking the most likely token")
    return parser.parse_args()


def load(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if name is None:
        tokenizer = build_tokenizer(synthetic_rows(64, seed=0))
        return build_model(tokenizer), tokenizer
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device), AutoTokenizer.from_pretrained(name)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> torch.Tensor:
    """The token ids (1, tokens) of one prompt, as a turn where the tokenizer has a chat template."""
    if tokenizer.chat_template is None:
        return tokenizer(question, return_tensors="pt")["input_ids"]
    messages = [{"role": "user", "content": question}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(messages, **options)["input_ids"]


def main() -> None:
    args = parse_arguments()
    model, tokenizer = load(args.model)
    questions = [TEMPLATE.format(choice=choice) for choice in CHOICES]
    chat = tokenizer.chat_template is not None
    contexts = [[{"role": "user", "content": question}] if chat else question for question in questions]
    question = TEMPLATE.format(choice=" ".join(CHOICES))
    print("One prompt:", question, sep="\n  ")
    ids = prompt_ids(tokenizer, question).to(model.device)
    torch.manual_seed(0)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.max_new_tokens,
        do_sample=args.do_sample,
    )
    print(f"\nstandard inference: {tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()!r}")

    print("\nContexts:", *questions, sep="\n  ")
    for weighting in WEIGHTINGS:
        torch.manual_seed(0)
        out = miso_generate(
            model,
            tokenizer,
            contexts,
            weighting=weighting,
            max_new_tokens=args.max_new_tokens,
            do_sample=args.do_sample,
        )
        print(f"\n{weighting}: {tokenizer.decode(out[0], skip_special_tokens=True).strip()!r}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:  # such as a mistyped model
        raise SystemExit(f"generate_multi_context.py: {str(error).splitlines()[0]}") from error
