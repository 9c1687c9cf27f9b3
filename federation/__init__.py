"""What a round is: task, plan, aggregation, the Flower apps, and the engines that run them."""
