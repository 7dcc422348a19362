/**
 * A stand-in for `jsr:@std/cli`, for networks that do not reach jsr.io. It has only what charserve uses.
 *
 * @module
 */
export { parseArgs } from "./parse_args.ts";
