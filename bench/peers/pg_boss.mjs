// Writes down the statements that pg-boss sends: node pg_boss.mjs PACKAGE OUT
//
// They come from the module in which it builds all of its SQL; the rest of the package, and what that depends on, is not
// needed, so any version of node can do this. The driver puts its own queue and batch size in the place of ours.
import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [root, out] = process.argv.slice(2);
const plans = await import(pathToFileURL(path.join(root, "dist/plans.js")));
const { pgboss } = JSON.parse(fs.readFileSync(path.join(root, "package.json"), "utf8"));

const schema = "pgboss";
const name = "bench_queue_name";
const table = plans.COMMON_JOB_TABLE;
const policy = plans.QUEUE_POLICIES.standard;
const write = (file, text) => fs.writeFileSync(path.join(out, `${file}.sql`), text);

write("schema", plans.create(schema, pgboss.schema, { createSchema: true }));
write("create_queue", plans.createQueue(schema, name, { policy }));
write("enqueue", plans.insertJobs(schema, { table, name, returnId: true }));
const claim = plans.fetchNextJob({ schema, table, name, policy, limit: 987654321 });
if (claim.values?.length) throw new Error("Error: a fetch has parameters now");
write("claim", claim.text);
write("complete", plans.completeJobs(schema, table, false, false));
