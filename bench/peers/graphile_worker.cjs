// Writes down the statements that graphile-worker sends: node graphile_worker.cjs PACKAGE OUT
//
// Its own functions are called with a client that only listens. One file a statement, with its own parameters.
const fs = require("node:fs");
const path = require("node:path");

const [root, out] = process.argv.slice(2);
const schema = "graphile_worker";
const { migrations } = require(path.join(root, "dist/generated/sql.js"));
const { batchGetJobs } = require(path.join(root, "dist/sql/getJobs.js"));
const { batchCompleteJobs } = require(path.join(root, "dist/sql/completeJobs.js"));

const heard = [];
const client = {
  async query({ text, values }) {
    heard.push(text);
    return { rows: /^select id, identifier/.test(text) ? [{ id: values.length, identifier: "bench" }] : [] };
  },
};
const withClient = async (call) => call(client);
withClient.withRetries = withClient;
const shared = {
  workerSchema: schema,
  escapedWorkerSchema: schema,
  resolvedPreset: { worker: { preparedStatements: true, useNodeTime: false } },
  logger: console,
};

async function statement(name, call) {
  await call();
  fs.writeFileSync(path.join(out, `${name}.sql`), heard.at(-1));
}

async function main() {
  const numbered = Object.keys(migrations).sort();
  const create = `create schema ${schema};
    create table ${schema}.migrations(id int primary key, ts timestamptz default now() not null, breaking boolean not null default false);`;
  const steps = numbered.map((file) => migrations[file].replace(/:GRAPHILE_WORKER_SCHEMA\b/g, schema));
  fs.writeFileSync(path.join(out, "schema.sql"), [create, ...steps].join("\n;\n"));

  const pool = "bench";
  // The size of a batch is part of the text: the driver puts its own in the place of this one.
  await statement("claim", () => batchGetJobs(shared, withClient, { bench() {} }, pool, [], 987654321));
  await statement("complete", () => batchCompleteJobs(shared, withClient, pool, [{ id: 1 }]));
  await statement("complete_many", () => batchCompleteJobs(shared, withClient, pool, [{ id: 1 }, { id: 2 }]));
}

main().catch((error) => {
  console.error(`Error: ${error.message}`);
  process.exit(1);
});
