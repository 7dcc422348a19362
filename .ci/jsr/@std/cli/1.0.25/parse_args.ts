/**
 * A stand-in for `jsr:@std/cli/parse-args`, for networks that do not reach jsr.io: it reads every
 * command line as the real one does, surprises included. The types are the real one's too, but for
 * dotted names (`--a.b`), which they do not take apart.
 *
 * @module
 */

type Name = string | undefined;
type Aliases<Other extends string = string> = Partial<Record<string, Other | readonly Other[]>>;

/** What each of the options named is, before defaults and aliases. */
type Values<Flags, Texts, Lists, Negatable> =
  & Fields<Extract<Texts, string>, string, Lists, Negatable>
  & Required<Fields<Extract<Flags, string>, boolean, Lists, undefined>>
  & {
    [Key in Exclude<Extract<Lists, string>, Texts | Flags>]: unknown[] | Negated<Key, Negatable>;
  };

type Fields<Names extends string, Value, Lists, Negatable> =
  & { [Key in Exclude<Names, Lists>]?: Value | Negated<Key, Negatable> }
  & { [Key in Extract<Names, Lists>]: Value[] | Negated<Key, Negatable> | Unlisted<Key> };

type Negated<Key, Negatable> = Key extends Negatable ? false : never;

/** Names that are not literals may or may not be those asked for. */
type Unlisted<Key> = string extends Key ? undefined : never;

type WithDefaults<Fields, Defaults> = Defaults extends undefined ? Fields
  :
    & Omit<Fields, keyof Defaults>
    & {
      [Key in keyof Defaults]: Key extends keyof Fields ? Defaults[Key] | NonNullable<Fields[Key]>
        : unknown;
    };

type WithAliases<Fields, Alias> = {
  [Key in keyof Fields as Key | AliasesOf<Key, Alias>]: Fields[Key];
};

type AliasesOf<Key, Alias> = Key extends keyof Alias ? string extends Alias[Key] ? never
  : Extract<Alias[Key] extends string[] ? Alias[Key][number] : Alias[Key], string>
  : never;

/** Without a word on types, the result is as loose as the real one's. */
type Typed<Flags, Texts, Lists, Fields> = Extract<Flags, string | true> | Extract<Texts | Lists, string> extends never
  ? Loose
  : Record<string, unknown> & Fields;

// deno-lint-ignore no-explicit-any
type Loose = Record<string, any>;

type Args<Fields, Dashes> = Flat<
  & Fields
  & {
    /** The words that belong to no option; those that read as numbers are numbers. */
    _: (string | number)[];
  }
  & (true extends Dashes ? Rest : unknown)
>;

type Rest = {
  /** The words after `--`. */
  "--": string[];
};

/** One object type instead of an intersection: shorter messages from the compiler. */
type Flat<Type> = { [Key in keyof Type]: Type[Key] };

interface ParseOptions<Flags, Texts, Lists, Negatable, Defaults, Alias, Dashes> {
  /** Puts the words after `--` in the result's `--`, not in `_`. */
  "--"?: Dashes;
  /** Other names of options. */
  alias?: Alias;
  /** Options that take no value; `true`: all long ones without `=`. */
  boolean?: Flags | readonly Extract<Flags, string>[];
  /** Values of options that are not given. */
  default?: Defaults;
  /** Takes all words from the first that is no option as they are. */
  stopEarly?: boolean;
  /** Options whose values stay strings, even if they look like numbers. */
  string?: Texts | readonly Extract<Texts, string>[];
  /** Options that may be given many times. */
  collect?: Lists | readonly Extract<Lists, string>[];
  /** Options that `--no-…` turns off. */
  negatable?: Negatable | readonly Extract<Negatable, string>[];
  /** Called with what the other options do not name; `false` drops it. */
  unknown?: (arg: string, key?: string, value?: unknown) => unknown;
}

type AnyOptions = ParseOptions<
  boolean | Name,
  Name,
  Name,
  Name,
  Record<string, unknown> | undefined,
  Aliases | undefined,
  boolean | undefined
>;

/**
 * Reads a command line.
 *
 * @param args The words, as in `Deno.args`
 * @param options What is known of the options
 * @returns The options by name, the other words as `_`
 */
export function parseArgs<
  Dashes extends boolean | undefined = undefined,
  Flags extends boolean | Name = undefined,
  Texts extends Name = undefined,
  Lists extends Name = undefined,
  Negatable extends Name = undefined,
  Defaults extends Record<string, unknown> | undefined = undefined,
  Alias extends Aliases<Other> | undefined = undefined,
  Other extends string = string,
>(
  args: string[],
  options?: ParseOptions<Flags, Texts, Lists, Negatable, Defaults, Alias, Dashes>,
): Args<
  Typed<
    Flags,
    Texts,
    Lists,
    WithAliases<WithDefaults<Values<Flags, Texts, Lists, Negatable>, Defaults>, Alias>
  >,
  Dashes
> {
  return read(args, (options ?? {}) as AnyOptions) as ReturnType<
    typeof parseArgs<Dashes, Flags, Texts, Lists, Negatable, Defaults, Alias, Other>
  >;
}

type Tree = { [name: string]: unknown };

const LONG_OPTION = /^--(?<no>no-)?(?<name>.+?)(?:=(?<value>.+))?$/s;

function read(args: string[], options: AnyOptions): Tree & { _: unknown[] } {
  const others = otherNames(options.alias ?? {});
  const family = (names: Name | readonly string[]) =>
    new Set(list(names).flatMap((name) => [name, ...(others.get(name) ?? [])]));
  const everyLongIsFlag = options.boolean === true;
  const flags = family(typeof options.boolean === "boolean" ? [] : options.boolean);
  const texts = family(options.string);
  const lists = family(options.collect);
  const negatable = family(options.negatable);

  const end = args.indexOf("--");
  const words = end < 0 ? args : args.slice(0, end);
  const rest = end < 0 ? [] : args.slice(end + 1);
  const result: Tree & { _: unknown[] } = { _: [] };

  function isNamed(name: string, word: string): boolean {
    return [flags, texts, lists, others].some((names) => names.has(name)) ||
      (everyLongIsFlag && /^--[^=]+$/.test(word));
  }

  function set(name: string, value: string | boolean, word: string, gathers = true): void {
    if (!isNamed(name, word) && options.unknown?.(word, name, value) === false) return;
    const read = typeof value === "string" && !texts.has(name) ? numberOr(value) : value;
    for (const each of [name, ...(others.get(name) ?? [])]) {
      put(result, each, read, gathers && lists.has(name));
    }
  }

  /** Sets an option that has no value of its own; returns whether it took the next word. */
  function setFromNext(name: string, word: string, next: string, nextIsValue: boolean): boolean {
    const isFlag = [name, ...(others.get(name) ?? [])].some((each) => flags.has(each));
    if (next !== "" && nextIsValue && !isFlag) set(name, next, word);
    else if (next === "true" || next === "false") set(name, next === "true", word);
    else {
      set(name, texts.has(name) ? "" : true, word);
      return false;
    }
    return true;
  }

  function setLong(word: string, next: string): boolean {
    const { no, name = "", value } = LONG_OPTION.exec(word)?.groups ?? {};
    if (value !== undefined) {
      set(name, flags.has(name) ? value !== "false" : value, word);
      return false;
    }
    if (no !== undefined && negatable.has(name)) {
      set(name, false, word, false);
      return false;
    }
    return setFromNext((no ?? "") + name, word, next, !everyLongIsFlag && !next.startsWith("-"));
  }

  /** `-abc`: a letter takes what follows it as its value if that has `=`, ends in digits or is no word. */
  function setShort(word: string, next: string): boolean {
    const last = word.length - 1;
    for (let i = 1; i < last; i++) {
      const letter = word.charAt(i), following = word.slice(i + 1);
      if (following === "-") {
        set(letter, "-", word);
        continue;
      }
      const isLetter = /[A-Za-z]/.test(letter);
      const value = isLetter ? /=(.+)/.exec(following)?.[1] : undefined;
      const isValue = (isLetter && /\d(\.\d*)?(e-?\d+)?$/.test(following)) ||
        (i + 1 < last && /\W/.test(word.charAt(i + 1)));
      if (value !== undefined || isValue) {
        set(letter, value ?? following, word);
        return false;
      }
      set(letter, texts.has(letter) ? "" : true, word);
    }
    if (word.charAt(last) === "-") return false;
    return setFromNext(word.charAt(last), word, next, !/^--?[^-]/.test(next));
  }

  for (let i = 0; i < words.length; i++) {
    const word = words[i] ?? "", next = words[i + 1] ?? "";
    if (word.startsWith("-") && word !== "-") {
      if ((word.startsWith("--") ? setLong : setShort)(word, next)) i++;
      continue;
    }
    if (options.unknown?.(word) !== false) result._.push(texts.has("_") ? word : numberOr(word));
    if (options.stopEarly) {
      result._.push(...words.slice(i + 1));
      break;
    }
  }

  for (const [name, value] of Object.entries(options.default ?? {})) {
    if (has(result, name)) continue;
    for (const each of [name, ...(others.get(name) ?? [])]) put(result, each, value, false);
  }
  for (const name of flags) {
    if (!has(result, name)) put(result, name, lists.has(name) ? [] : false, false);
  }
  for (const name of texts) {
    if (!has(result, name) && lists.has(name)) put(result, name, [], false);
  }
  if (options["--"]) result["--"] = rest;
  else result._.push(...rest);
  return result;
}

function list(names: Name | readonly string[]): string[] {
  return (typeof names === "string" ? [names] : [...(names ?? [])]).filter((name) => name !== "");
}

/** Each name of an option with its other names. */
function otherNames(alias: Aliases): Map<string, string[]> {
  const others = new Map<string, string[]>();
  for (const [name, value] of Object.entries(alias)) {
    if (value === undefined) throw new TypeError("Alias value must be defined");
    const group = [name, ...(typeof value === "string" ? [value] : value)];
    for (const one of group) others.set(one, group.filter((other) => other !== one));
  }
  return others;
}

function numberOr(text: string): string | number {
  return /\S/.test(text) && Number.isFinite(Number(text)) ? Number(text) : text;
}

/** Sets a value; dots in the name lead into objects. */
function put(tree: Tree, name: string, value: unknown, gathers: boolean): void {
  const path = name.split("."), last = path.pop() ?? "";
  for (const step of path) tree = (tree[step] ??= {}) as Tree;
  const old = tree[last];
  if (gathers && Array.isArray(old)) old.push(value);
  else if (gathers) tree[last] = old ? [old, value] : [value];
  else tree[last] = value;
}

function has(tree: Tree, name: string): boolean {
  return name.split(".").every((step) => {
    const isOwn = Object.hasOwn(tree, step);
    tree = tree[step] as Tree;
    return isOwn;
  });
}
