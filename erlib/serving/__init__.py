"""Real servers, up and down: messages, Triton, NGINX, all of it as a stack, and an OpenAI front."""
