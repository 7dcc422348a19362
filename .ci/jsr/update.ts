/**
 * Writes anew the manifests of the stand-in packages in this folder: the size and checksum of every
 * file, without which Deno refuses a package. Run it after any change here:
 *
 * ```sh
 * deno run --allow-read=.ci --allow-write=.ci .ci/jsr/update.ts
 * ```
 *
 * @module
 */

const ROOT = new URL("./@std/", import.meta.url);

for (const name of await entries(ROOT)) {
  const folder = new URL(`${name}/`, ROOT);
  const versions = (await entries(folder)).filter((entry) => !entry.endsWith(".json"));
  for (const version of versions) {
    const manifest = new URL(`${version}_meta.json`, folder);
    const { exports } = JSON.parse(await Deno.readTextFile(manifest));
    await write(manifest, { manifest: await checksums(new URL(`${version}/`, folder)), exports });
  }
  await write(new URL("meta.json", folder), {
    scope: "std",
    name,
    latest: versions.at(-1),
    versions: Object.fromEntries(versions.map((version) => [version, {}])),
  });
}

async function entries(folder: URL): Promise<string[]> {
  const names = await Array.fromAsync(Deno.readDir(folder), (entry) => entry.name);
  return names.sort();
}

async function checksums(folder: URL): Promise<Record<string, unknown>> {
  const files: Record<string, unknown> = {};
  for (const name of await entries(folder)) {
    const bytes = await Deno.readFile(new URL(name, folder));
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    files[`/${name}`] = { size: bytes.length, checksum: `sha256-${hex}` };
  }
  return files;
}

async function write(file: URL, value: unknown): Promise<void> {
  await Deno.writeTextFile(file, JSON.stringify(value, null, 2) + "\n");
}
