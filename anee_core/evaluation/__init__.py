"""What a policy makes of a text: quality, reports and cards."""

from anee_core.evaluation.report import replay, write_report
from anee_core.evaluation.text_quality import TextQuality, dense_logits, dense_perplexity, text_blocks, text_quality

__all__ = ["TextQuality", "dense_logits", "dense_perplexity", "replay", "text_blocks", "text_quality", "write_report"]
