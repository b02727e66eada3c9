"""PLLaVA's benchmarks on a loaded model: MVBench, VideoQA, VCGBench and recaptioning.

    python -m precision.evaluate mvbench|videoqa|vcgbench|recaption --data DIR --model_path W --output_dir RESULTS
    python -m precision.evaluate judge RESULTS --judge_url URL --judge_model NAME
    python -m precision.evaluate compare RESULTS RESULTS ...

Data layouts, prompts, frame sampling and result files are those of PLLaVA's tasks/eval. Where that code crashes or
miscounts silently, this package reports the problem.
"""
