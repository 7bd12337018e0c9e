"""From a run folder to tables, plots and a verdict: what `lit_llmers.report` is made of."""
