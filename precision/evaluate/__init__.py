"""PLLaVA's benchmarks on a loaded model: MVBench, VideoQA, VCGBench and recaptioning.

    python -m precision.evaluate mvbench|videoqa|vcgbench|recaption --data DIR --model_path W --output_dir RESULTS
    python -m precision.evaluate judge RESULTS --judge_url URL --judge_model NAME
    python -m precision.evaluate compare RESULTS RESULTS ...

The layouts of the data, the prompts, which frames are taken and the forms of the results are those of PLLaVA's
tasks/eval; where it would crash or count silently, this package says so instead.
"""
