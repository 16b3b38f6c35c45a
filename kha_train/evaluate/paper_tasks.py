"""The 19 tasks of table 4 of the KHA paper (arXiv 2510.23052), and what lm-evaluation-harness 0.4.13 calls them."""

from __future__ import annotations

from typing import NamedTuple


class PaperTask(NamedTuple):
    """A task of the paper: its `harness` name, "" where the harness has none; the `folder` of the harness's tasks that
    defines it; how it `asks`: "choices" are compared by their likelihood, "text" is generated, "code" is generated and
    executed. `note` says what differs."""

    paper: str
    harness: str
    folder: str
    asks: str
    note: str = ""


PAPER_TASKS = (
    PaperTask("ARC-c", "arc_challenge", "arc", "choices"),
    PaperTask("AGIEval", "agieval", "agieval", "choices", "two of its 21 parts generate text"),
    PaperTask("HellaSwag", "hellaswag", "hellaswag", "choices"),
    PaperTask("WinoGrande", "winogrande", "winogrande", "choices"),
    PaperTask("PIQA", "piqa", "piqa", "choices"),
    PaperTask("MMLU", "mmlu", "mmlu", "choices", "57 parts"),
    PaperTask("MMLU-Pro", "mmlu_pro", "mmlu_pro", "text", "14 parts"),
    PaperTask("CMMLU", "cmmlu", "cmmlu", "choices", "67 parts"),
    PaperTask(
        "C-Eval", "ceval-valid", "ceval", "choices", "52 parts; the validation split, for the test is not public"
    ),
    PaperTask("CommonsenseQA", "commonsense_qa", "commonsense_qa", "choices"),
    PaperTask("GPQA", "gpqa_main_n_shot", "gpqa", "choices", "the main set; the paper does not say which"),
    PaperTask("RACE-m", "", "", "choices", "the harness has the high-school part alone"),
    PaperTask("RACE-h", "race", "race", "choices"),
    PaperTask("HumanEval+", "humaneval_plus", "humaneval", "code"),
    PaperTask("MBPP", "mbpp", "mbpp", "code"),
    PaperTask("MBPP+", "mbpp_plus", "mbpp", "code"),
    PaperTask("GSM8K", "gsm8k", "gsm8k", "text"),
    PaperTask("MATH", "hendrycks_math", "hendrycks_math", "text", "7 parts"),
    PaperTask("CMATH", "", "", "text", "not in the harness"),
)
