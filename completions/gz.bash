_gz_completion() {
    local IFS=$'
'
    COMPREPLY=( $( env COMP_WORDS="${COMP_WORDS[*]}" \
                   COMP_CWORD=$COMP_CWORD \
                   _GZ_COMPLETE=complete_bash $1 ) )
    return 0
}

complete -o default -F _gz_completion gz

_gzcli_completion() {
    local IFS=$'
'
    COMPREPLY=( $( env COMP_WORDS="${COMP_WORDS[*]}" \
                   COMP_CWORD=$COMP_CWORD \
                   _GZCLI_COMPLETE=complete_bash $1 ) )
    return 0
}

complete -o default -F _gzcli_completion gzcli
