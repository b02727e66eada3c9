"""Clips of moving shapes with multiple-choice questions, in MVBench's layout: a benchmark that needs no download.

    python -m precision.shapes --output DIR
    python -m precision.evaluate mvbench --data DIR --model_path examples/tiny_pllava --output_dir RESULTS

The clips and their questions are those of `examples/render_shapes.py` and `examples/shape_questions.py`, from seeds
that `examples/train_tiny_pllava.py` never draws.
"""
