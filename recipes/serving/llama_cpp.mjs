// Generate greedily with llama.cpp from the token ids that check_export.py --prompts wrote.
//
//     node llama_cpp.mjs MODEL.gguf PROMPTS.json GENERATIONS.json [THREADS [EXPERTS]]
//
// EXPERTS overrides how many experts a token computes, in a file of `moefy export --to gguf`.
// Token ids go in and come out, so that no tokenizer and no chat template has a part in the comparison.

import {readFileSync, writeFileSync} from "node:fs";
import {getLlama, getModuleVersion, readGgufFileInfo} from "node-llama-cpp";

const [modelPath, promptsPath, outPath, threads = "0", experts = ""] = process.argv.slice(2);
if (outPath === undefined) {
    console.error("usage: node llama_cpp.mjs MODEL.gguf PROMPTS.json GENERATIONS.json [THREADS [EXPERTS]]");
    process.exit(2);
}
const {prompts, new_tokens: newTokens, stop} = JSON.parse(readFileSync(promptsPath, "utf8"));

const llama = await getLlama({gpu: false, build: "never", maxThreads: Number(threads)});

async function overrides() {
    const {architecture} = (await readGgufFileInfo(modelPath)).metadata.general;
    const used = Number(experts);
    // a number with a fraction is passed on as a float, and this one is a float32 without
    return {[architecture]: {expert_used_count: used, expert_weights_scale: used * (1 + 1e-9)}};
}

const model = await llama.loadModel({modelPath, metadataOverrides: experts === "" ? undefined : await overrides()});
const context = await model.createContext({
    contextSize: Math.max(...prompts.map((prompt) => prompt.length)) + newTokens,
    threads: Number(threads),
    flashAttention: false,
    experimentalKvCacheKeyType: "F32", // the default of F16 rounds keys and values
    experimentalKvCacheValueType: "F32"
});
const sequence = context.getSequence();

async function next(tokens, logits) {
    const input = [...tokens];
    input.push([input.pop(), {generateNext: {token: true, logits, options: {temperature: 0}}}]);
    return (await sequence.controlledEvaluate(input)).at(-1).next;
}

const generations = [], firstLogits = [];
for (const prompt of prompts) {
    await sequence.clearHistory();
    let {token, logits} = await next(prompt, true);
    const generated = [token];
    while (generated.length < newTokens && !stop.includes(token)) {
        ({token} = await next([token], false));
        generated.push(token);
    }
    generations.push(generated);
    firstLogits.push(Array.from({length: logits.size}, (_, id) => logits.get(id)));
}

const engine = `llama.cpp ${llama.llamaCppRelease.release} in node-llama-cpp ${await getModuleVersion()}`;
writeFileSync(outPath, JSON.stringify({engine, generations, first_logits: firstLogits}));
console.log(`${engine}: ${generations.length} generations of at most ${newTokens} tokens`);
process.exit(0); // its threads would keep the process alive
