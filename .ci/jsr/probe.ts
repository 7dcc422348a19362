/**
 * Tells whether Deno gets packages where it looks for them: exit status 0 or 1, and a line on
 * standard error that says which ones the tests will use. With a status of 1, point `JSR_URL` at this
 * folder.
 *
 * Deno itself waits for a silent registry for minutes; this waits for seconds.
 *
 * @module
 */

const DEADLINE_MS = 10_000;

// No literal where it is imported: Deno would fetch that before the first line runs, and wait.
const PACKAGE = "@std/assert";

const { promise: deadline, reject } = Promise.withResolvers<never>();
setTimeout(() => reject(new Error(`no answer in ${DEADLINE_MS / 1000} s`)), DEADLINE_MS);

try {
  await Promise.race([import(PACKAGE), deadline]);
  console.error(`Packages: ${Deno.env.get("JSR_URL") ?? "https://jsr.io/"}`);
  Deno.exit(0);
} catch (error) {
  const reason = error instanceof Error ? error.message : error;
  console.error(`Packages: the stand-ins of .ci/jsr (${reason})`);
  Deno.exit(1);
}
