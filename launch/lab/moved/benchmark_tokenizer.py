from launch.lab.moving import forward

forward("launch.benchmark_tokenizer", "launch.lab.benchmark parts")
