"""A benchmark without a download: clips of moving shapes with multiple-choice questions, in MVBench's layout.

    python -m precision.shapes --output DIR
    python -m precision.evaluate mvbench --data DIR --model_path examples/tiny_pllava --output_dir RESULTS

`examples/render_shapes.py` renders the clips and `examples/shape_questions.py` asks the questions. The seeds are
not among those that `examples/train_tiny_pllava.py` draws.
"""
