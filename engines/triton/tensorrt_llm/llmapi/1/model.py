"""Triton Python-backend model: TensorRT-LLM's LLM API, one response per token.

The LLM API gets and returns token ids; prompts are tokenised and tokens made text by the code that stands around an
engine, so that both flows read and write the same. (The LLM API's own text is cumulative, and holds back a character
that is cut between tokens.)

Each request is a coroutine on one event loop, as the LLM API wants it. What it has for clients goes to a thread that
counts and sends, so that the loop does not wait for Triton.
"""

import asyncio
import json
import queue
import threading

import texts
import triton_python_backend_utils as pb_utils
from tensorrt_llm import LLM, SamplingParams

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
CANCEL_CHECK_S = 0.5  # is_cancelled() is a round trip to the server


class TritonPythonModel:
    def initialize(self, args):
        parameters = texts.parameters(args)
        self.texts = texts.Texts(parameters["tokenizer"])
        self.generated = texts.TokenCounter()
        llm_args = json.loads(parameters["llm_args"])
        self.adapters = []
        if adapters := json.loads(parameters["adapters"]):
            from tensorrt_llm.executor import LoRARequest
            from tensorrt_llm.lora_helper import LoraConfig

            llm_args["lora_config"] = LoraConfig(**llm_args["lora_config"])
            self.adapters = [LoRARequest(f"expert-{i}", i + 1, folder) for i, folder in enumerate(adapters)]
        self.context_tokens = int(parameters["context_tokens"])
        self.llm = LLM(**llm_args)  # starts a process per GPU
        self.loop = asyncio.new_event_loop()
        self.outbox = queue.SimpleQueue()
        for target in (self.loop.run_forever, self._send):
            threading.Thread(target=target, daemon=True).start()

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                asked = self._read(request)
            except texts.BadRequest as error:
                sender.send(texts.error(error), flags=FINAL)
            else:
                asyncio.run_coroutine_threadsafe(self._serve(sender, *asked), self.loop)

    def finalize(self):
        self.llm.shutdown()

    def _read(self, request):
        # It knows no longest prompt, and would shorten an answer for which there is no room without a word.
        prompt, max_tokens, end_id = self.texts.read(request, self.context_tokens, self.context_tokens)
        sampling = SamplingParams(
            max_tokens=max_tokens,
            # Always said: the same token as with an engine, wherever the LLM API would look for one itself.
            end_id=self.texts.end_id if end_id < 0 else end_id,
            ignore_eos=end_id < 0,
            detokenize=False,
        )
        adapter = self.adapters[texts.expert(request, len(self.adapters))] if self.adapters else None
        return prompt, sampling, bool(texts.value(request, "stream", False)), adapter

    async def _serve(self, sender, prompt, sampling, streaming, adapter):
        generation = None
        try:
            generation = self.llm.generate_async(prompt, sampling, lora_request=adapter, streaming=streaming)
            answer = asyncio.ensure_future(self._answer(sender, generation, sampling, streaming))
            while not (await asyncio.wait([answer], timeout=CANCEL_CHECK_S))[0]:
                if sender.is_cancelled():
                    answer.cancel()
            await answer
        except asyncio.CancelledError:
            self.outbox.put((sender, None, 0, FINAL))
        except Exception as error:
            self.outbox.put((sender, texts.error(f"{type(error).__name__}: {error}"), 0, FINAL))
        finally:
            if generation is not None and not generation.finished:
                generation.abort()  # its slot is free for the next

    async def _answer(self, sender, generation, sampling, streaming):
        n = 0
        async for message in generation:
            (output,) = message.outputs
            tokens = output.token_ids[n:]  # all so far; a message may have brought none, or several
            n += len(tokens)
            parts = [[token] for token in tokens] if streaming else [tokens]
            responses = [(self.texts.response(part), len(part)) for part in parts]
            if message.finished:
                if n != sampling.max_tokens and (sampling.ignore_eos or output.finish_reason != "stop"):
                    why = f"the engine ended the answer after {n} of {sampling.max_tokens} tokens"
                    responses.append((texts.error(f"{why}: {output.finish_reason}"), 0))
                elif not responses:  # the final flag comes with a response, or clients would not see it
                    responses.append((self.texts.response([]), 0))
            for i, response in enumerate(responses, 1):
                self.outbox.put((sender, *response, FINAL if message.finished and i == len(responses) else 0))

    def _send(self):
        while True:
            waiting = [self.outbox.get()]
            waiting += [self.outbox.get() for _ in range(self.outbox.qsize())]
            self.generated.increment(sum(n for _, _, n, _ in waiting))  # before anybody can have received them
            for sender, response, _, flags in waiting:
                try:
                    sender.send(response, flags=flags)
                except Exception as error:  # one that Triton has given up must not stop the others
                    pb_utils.Logger.log_error(f"sender: {type(error).__name__}: {error}")
